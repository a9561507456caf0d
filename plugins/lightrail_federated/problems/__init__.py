"""Problems on which the claims of federated methods are measured."""
