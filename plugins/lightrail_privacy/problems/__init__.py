"""Problems on which the claims of private methods are measured."""
