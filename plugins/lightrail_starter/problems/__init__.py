"""Small problems on which the claims of methods are measured."""
