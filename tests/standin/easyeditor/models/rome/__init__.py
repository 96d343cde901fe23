"""A method without an adapter."""

from dataclasses import dataclass

import yaml

from ...util.hparams import HyperParams


@dataclass
class ROMEHyperParams(HyperParams):
    alg_name: str

    @classmethod
    def from_hparams(cls, path):
        with open(path) as stream:
            return cls(**yaml.safe_load(stream))


def apply_rome_to_model(model, tok, requests, hparams):
    return model
