"""Pictures that explain the method, a module each. ./run_mpi.sh figures NAME draws one.

A module has ``draw``, which returns the figure, a ``CAPTION``, and the ``ALT`` text for those who
do not see it. ``DATA`` is the file in reproduce/results that ``draw`` takes, or None; ``measure``,
where there is one, makes its content, and takes CIFAR-10 if the module says ``NEEDS_IMAGES``.
"""
