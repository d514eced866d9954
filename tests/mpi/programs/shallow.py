"""reproduce/invariance.py with one block in each stage of the network instead of 3 to 6: for tests
in which the network is but a load. Other programs import it to train the same."""

import sys

from reproduce import invariance, resnet50, train

resnet50.BLOCKS = dict.fromkeys(resnet50.BLOCKS, 1)

if __name__ == '__main__':
    train.job.run(lambda: invariance.main(sys.argv[1:]))
