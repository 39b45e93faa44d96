"""What happened at each step (stand-in while being written)."""


class DoLaTrace:
    pass
