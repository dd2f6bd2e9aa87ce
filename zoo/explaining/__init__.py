"""Looking inside a network: what it looks at, what fools it, and the pictures that it would like to see."""
