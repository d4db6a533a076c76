"""Where a token is: rotary positions and how to stretch them."""
