"""Small data that needs no download and no account: real digits, and generators that write official formats."""
