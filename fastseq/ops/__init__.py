"""Operators as torch sees them: schema, fake, autograd and the choice of a backend."""
