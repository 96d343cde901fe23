"""The statistics that MEMIT and AlphaEdit ask for, from a file of texts in the place of Wikipedia.

    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/local_statistics.py texts.txt \\
        --hparams examples/easyedit/hparams/memit-llama-3.2-3b-instruct.yaml

One text a line. EasyEdit computes the second moments of each edited layer's inputs over all of them and keeps them in
the file's stats_dir, where its methods look first; mom2_n_samples has to be the number of texts then. They are as good
as the texts are like what the model must not forget.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from framework import Config, load_config, load_hparams, quiet, read_texts, with_changes


def compute(config: Config, texts: list[str]) -> None:
    """Fill the config's stats_dir."""
    from easyeditor import BaseEditor

    module: Any = importlib.import_module("easyeditor.models.rome.layer_stats")
    with quiet():
        editor = BaseEditor.from_hparams(load_hparams(config))
    hparams = editor.hparams
    wikipedia = module.load_dataset
    module.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    try:
        for layer in hparams.layers:
            module.layer_stats(
                editor.model,
                editor.tok,
                hparams.rewrite_module_tmp.format(layer),
                hparams.stats_dir,
                hparams.mom2_dataset,
                ["mom2"],
                sample_size=len(texts),
                precision=hparams.mom2_dtype,
                hparams=hparams,
            )
    finally:
        module.load_dataset = wikipedia


def main() -> int:
    """Compute what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="one a line")
    parser.add_argument("--hparams", type=Path, required=True)
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--change", default="", help="hparams to change, as layers=[2,3]")
    arguments = parser.parse_args()
    if "EASYEDIT_ROOT" in os.environ:
        sys.path.insert(0, os.environ["EASYEDIT_ROOT"])
    try:
        texts = read_texts(arguments.texts)
        config = load_config(arguments.hparams, arguments.model, token_loss=None)
        with_changes(config, arguments.change)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if "mom2_dataset" not in config:
        parser.error(f"{config['alg_name']}, the method of {arguments.hparams}, asks for no statistics")
    compute(config, texts)
    print(f"mom2_n_samples: {len(texts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
