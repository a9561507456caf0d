"""Problems made for what some methods claim: bad scaling, saddles, games, low rank, hyperbolic space."""
