"""What watches a generative model while it trains."""
