"""The ranks of a run: how they meet, what they tell each other, and the grid that they form."""
