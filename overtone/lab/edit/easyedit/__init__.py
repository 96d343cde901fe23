"""EasyEdit's own trainers as methods of the lab; EasyEdit is imported once one of them is opened."""
