"""A byte-level BPE tokenizer for a world: small enough that names fall into several tokens, which other names share."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

END, PAD = "<eos>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocabulary`` tokens.

    It adds nothing to a text but the space before its first word, so that a word has the same tokens at the beginning
    and inside, and ``prompt`` and ``" target"`` tokenized apart are the tokens of ``prompt + " target"``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Sorted, since the trainer breaks ties between merges by the order of the texts.
    bpe.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        # Without token types, which older versions add and no causal model takes.
        model_input_names=["input_ids", "attention_mask"],
    )
