"""What a plan takes in memory, time and money on a card, and which one is picked."""
