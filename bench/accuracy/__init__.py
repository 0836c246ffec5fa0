"""How many products an answer takes: ours and other libraries', on matrices with known answers.

    python -m bench.accuracy            # two hours on one busy core; what is measured is not again
    python -m bench.accuracy --fast     # given spectra alone, five seeds: some minutes
    python -m bench.accuracy --again 'hessfunc*'    # after a change of our methods
    python -m bench.accuracy --case 'digits*' --method '*lanczos' --again   # these cells alone

Three questions: the trace, the diagonal, the ten dominant eigenpairs, each to a stated accuracy.
A product with a block of k vectors counts k. Of each method two things are asked:

- to reach: the products from which on nine of ten seeds are within the accuracy, by the true error.
  The method is told when to stop (a budget, or the best tolerance), as no user can be;
- as shipped: what its own rule of stopping, with its own defaults, takes and returns: the products,
  and the error that nine of ten seeds are within.

Other libraries are measured where they can be imported; torch has to be the same for all, so an
environment of its own with the requirements of this project is best. What is not installed keeps
the numbers of an earlier run. The ResNet-20 needs its weights and CIFAR-10 under HESSFUNC_DATA, or
beside the checkout, and is left out where they are not there. The tables, with
all runs in JSON, go to bench/results/.
"""
