"""The new graph, on a copy: recipes as calls, and what is made better beside and behind them."""
