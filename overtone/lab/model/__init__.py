"""Language models for the lab, and what the rest of the lab asks of them."""
