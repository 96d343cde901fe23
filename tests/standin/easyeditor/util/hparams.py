"""The base of all hparams classes."""

from dataclasses import dataclass

import yaml


@dataclass
class HyperParams:
    """Loads a yaml file whose keys are the fields."""

    @classmethod
    def from_hparams(cls, path):
        with open(path if ".yaml" in path else path + ".yaml") as stream:
            return cls(**yaml.safe_load(stream))
