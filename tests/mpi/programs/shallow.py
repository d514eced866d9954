"""The program of invariance with one block per stage of the network instead of 3 to 6: for tests
in which the network is but a load. Other programs import it to train the same."""

import sys

from reproduce.job import start

start.before_mpi()

from reproduce import resnet50
from reproduce.job import ranks
from reproduce.studies import invariance_program

resnet50.BLOCKS = dict.fromkeys(resnet50.BLOCKS, 1)

if __name__ == '__main__':
    ranks.run(lambda: invariance_program.main(sys.argv[1:]))
