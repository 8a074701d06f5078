"""Between a user's call and a backend: what a call is, who serves it, its place in autograd."""
