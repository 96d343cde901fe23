"""An invented MQuAKE case: two facts of a chain of three are edited, the third is new to the chain and unedited."""

from __future__ import annotations

from typing import Any


def record(song: str = "Low Tide", *, new_capital: str = "Bryne") -> dict[str, Any]:
    """The song's performer and the capital of the new performer's country change; that country stays what it was."""
    return {
        "case_id": 7,
        "requested_rewrite": [
            {
                "prompt": "{} was performed by",
                "subject": song,
                "question": f"Who performed {song}?",
                "target_true": {"str": "Ana Orr", "id": "Q1"},
                "target_new": {"str": "Dee Fox", "id": "Q2"},
            },
            {
                "prompt": "The capital of {} is",
                "subject": "Sarn",
                "question": "What is the capital of Sarn?",
                "target_true": {"str": "Sarnholm", "id": "Q3"},
                "target_new": {"str": new_capital, "id": "Q4"},
            },
        ],
        "questions": [
            f"What is the capital of the country of the performer of {song}?",
            f"Which city is the capital of the country that the performer of {song} is a citizen of?",
        ],
        "answer": "Oldport",
        "answer_alias": ["City of Oldport"],
        "new_answer": new_capital,
        "new_answer_alias": [["City of " + new_capital], []],
        "single_hops": [
            {"question": f"Who performed {song}?", "cloze": f"{song} was performed by", "answer": "Ana Orr"},
            {
                "question": "What is the country of citizenship of Ana Orr?",
                "cloze": "Ana Orr is a citizen of",
                "answer": "Port Land",
                "answer_alias": ["PL"],
            },
            {
                "question": "What is the capital of Port Land?",
                "cloze": "The capital of Port Land is",
                "answer": "Oldport",
            },
        ],
        "new_single_hops": [
            {
                "question": f"Who performed {song}?",
                "cloze": f"{song} was performed by",
                "answer": "Dee Fox",
                "answer_alias": ["Deirdre Fox"],
            },
            {
                "question": "What is the country of citizenship of Dee Fox?",
                "cloze": "Dee Fox is a citizen of",
                "answer": "Sarn",
                "answer_alias": [],
            },
            {
                "question": "What is the capital of Sarn?",
                "cloze": "The capital of Sarn is",
                "answer": new_capital,
                "answer_alias": [["City of " + new_capital], []],
            },
        ],
    }
