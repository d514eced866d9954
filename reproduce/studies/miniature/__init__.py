"""Which parts of the paper's recipe matter, in a training small enough for two cores?"""
