"""How a preparation step runs, and what it does to a sample."""
