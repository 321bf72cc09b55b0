"""The book's own production: figures, verdicts on the paper's claims, the layer explorer, executed notebooks."""
