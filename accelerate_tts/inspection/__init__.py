"""Look at a user's objects, modules and calls. Nothing here changes any of them."""
