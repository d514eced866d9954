"""What the tests of run_mpi.sh share."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # for "import fakes"


@pytest.fixture
def tree(tmp_path, root):
    from fakes import Tree

    return Tree(tmp_path, root)
