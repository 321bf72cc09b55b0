"""The parts that make the book: figures, outcomes of the paper's claims, the layer explorer, executed notebooks."""
