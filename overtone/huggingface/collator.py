"""Batches of ragged sequences with a weight for each token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq

__all__ = ["DataCollatorWithLossMask"]


class DataCollatorWithLossMask(DataCollatorForSeq2Seq):  # type: ignore[misc]
    """Pads ``loss_mask`` as transformers' `DataCollatorForSeq2Seq` pads ``labels``, which it does with the rest.

    A token of weight 0 also gets the label -100, so that whoever counts label tokens does not count it. For a Trainer
    with ``remove_unused_columns=False``.

    Args:
        *args, **kwargs: as `DataCollatorForSeq2Seq`: the tokenizer first.

    Raises:
        ValueError: from a call, for a row whose loss_mask is not as long as its labels.
    """

    def __call__(self, features: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        """A batch of rows, each with "input_ids", "labels" and "loss_mask" among its columns."""
        masks = [torch.as_tensor(feature["loss_mask"]) for feature in features]
        for mask, feature in zip(masks, features, strict=True):
            if len(mask) != len(feature["labels"]):
                raise ValueError(
                    f"loss_mask must have one weight for each of the {len(feature['labels'])} labels, got {len(mask)}"
                )
        rows = [{name: value for name, value in feature.items() if name != "loss_mask"} for feature in features]
        batch = super().__call__(rows, return_tensors)
        width = batch["labels"].shape[1]
        on_the_left = self.tokenizer.padding_side == "left"
        padded = [
            torch.nn.functional.pad(mask, (width - len(mask), 0) if on_the_left else (0, width - len(mask)))
            for mask in masks
        ]
        batch["loss_mask"] = torch.stack(padded)
        batch["labels"] = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        return batch
