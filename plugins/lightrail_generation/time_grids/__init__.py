"""Time grids: the times that a solver visits."""
