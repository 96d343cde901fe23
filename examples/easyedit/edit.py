"""Edit one fact with any of the hparams files, with the flag and without it.

    EASYEDIT_ROOT=~/EasyEdit python examples/easyedit/edit.py examples/easyedit/hparams/lora-llama-2-7b-chat.yaml \\
        --prompt "The capital of France is" --target "Lyon" --subject France

`--model` takes another model folder (its path must name a family that EasyEdit knows); the file is fitted to its depth.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from framework import Config, load_config, load_hparams, quiet
from rich.console import Console
from rich.table import Table


def edited_and_before(config: Config, request: dict[str, Any]) -> tuple[str, str, Any]:
    """What the model says after the prompt, before and after the edit, and EasyEdit's scores of it."""
    from easyeditor import BaseEditor

    with quiet():
        editor = BaseEditor.from_hparams(load_hparams(config))
        before = _continue(editor.model, editor.tok, request["prompt"])
        sequential = config["alg_name"] != "MELO"  # kept for the generation below; MELO keeps its edits anyway
        metrics, edited, _ = editor.edit_requests([request], sequential_edit=sequential, verbose=False)
        after = _continue(edited, editor.tok, request["prompt"])
    return before, after, metrics[0]["post"]


def _continue(model: Any, tok: Any, prompt: str, tokens: int = 8) -> str:
    import torch

    ids = tok(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):  # model(...) and not model.generate: WISE and MELO route by the whole input
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    text: str = tok.decode(ids[0, start:])
    return text


def main() -> int:
    """Edit twice, from the same model, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hparams", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--target", required=True, help="what should follow the prompt")
    parser.add_argument("--subject", required=True, help="a part of the prompt")
    parser.add_argument("--loc-prompt", default="The sky is", help="unrelated, shorter than the edit; WISE needs one")
    parser.add_argument("--model", help="folder of another model")
    arguments = parser.parse_args()
    if "EASYEDIT_ROOT" in os.environ:
        sys.path.insert(0, os.environ["EASYEDIT_ROOT"])
    import overtone.easyedit

    logging.getLogger("overtone.easyedit").setLevel(logging.WARNING)
    overtone.easyedit.install()
    request = {
        "prompt": arguments.prompt,
        "target_new": arguments.target,
        "ground_truth": "",
        "subject": arguments.subject,
        "loc_prompt": arguments.loc_prompt,
        "portability": {},
        "locality": {},
    }
    table = Table("loss", "before", "after", "Rel", title=arguments.prompt)
    for token_loss in (None, load_config(arguments.hparams).get("token_loss", "overtone")):
        config = load_config(arguments.hparams, arguments.model, token_loss=token_loss)
        before, after, scores = edited_and_before(config, request)
        name = "cross-entropy" if token_loss is None else str(token_loss)
        table.add_row(name, before, after, f"{100 * float(scores['rewrite_acc'][0]):.0f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
