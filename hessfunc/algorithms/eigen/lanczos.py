"""Eigenpairs at the ends of a spectrum, or near a shift, of one matrix or of a pencil."""

from __future__ import annotations

from typing import Unpack, get_args

import torch

from hessfunc.algorithms.driver import RunOptions, run_method
from hessfunc.algorithms.eigen.davidson import Davidson
from hessfunc.algorithms.eigen.pencil import Scaled
from hessfunc.algorithms.eigen.ritz import Which
from hessfunc.algorithms.eigen.thick_restart import Lanczos
from hessfunc.algorithms.offload import home
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import rows_dtype
from hessfunc.trees import Matvec, Tree


@validated
def lanczos(
    matvec: Matvec,
    like: Tree,
    *,
    k: int = 6,
    which: Which = "LM",
    sigma: float | None = None,
    metric: Tree | Matvec | None = None,
    block_size: int = 1,
    basis_size: int | None = None,
    basis_bytes: int | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_matvecs: int = 1000,
    search: int = 2,
    start: Tree | None = None,
    **run: Unpack[RunOptions],
) -> Eigenpairs:
    """Compute a few extreme eigenpairs of a symmetric matrix by thick-restart Lanczos.

    The rows V are an orthonormal basis of a Krylov space. The Ritz pairs, which are the eigenpairs
    of T = V A V', approximate the extreme eigenpairs of A. A full basis is restarted from its best
    Ritz vectors. A pair has converged when

        |A v - value v| <= max(rtol |value|, atol).

    Residuals follow from the products with the basis vectors, up to the rounding of these products.
    The rounding is estimated from the inner products: u'Av and v'Au differ by about as much. If
    this rounding is above a tenth of the tolerance, one product with a random combination of all
    pairs checks the residuals. If that product differs from its prediction by more than rounding,
    each residual is measured, by k more products. An eigenvalue that is zero up to rounding counts
    as converged when its residual is zero up to rounding, too. If the rounding of the products, a
    few eps |A|, hides the tolerance, pairs are not reported as converged, and the reason says so.

    A Krylov space of blocks of b vectors holds at most b copies of a repeated eigenvalue. If
    b < k, a few more steps begin at a random vector u outside of the basis. If they meet an
    eigenvalue that should be among the k, the run warns, and the reason says so. Otherwise s steps
    bound the part of u along an eigenvector x of such an eigenvalue,

        (x'u)^2 <= 1 / (p_0(x)^2 + ... + p_s(x)^2),

    by the orthonormal polynomials p_j of the steps at the last wanted value. The certificate is the
    probability that x'u is so small for a random u, P(chi2_1 < n (x'u)^2).

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> top = hf.lanczos(matvec, like, k=3, seed=0)
        >>> top.values.round(decimals=3)
        tensor([10.,  9.,  8.], dtype=torch.float64)
        >>> bool(top.converged.all())
        True
        >>> hf.lanczos(matvec, like, k=1, which="SA", seed=0).values.round(decimals=3)
        tensor([1.], dtype=torch.float64)

    Args:
        matvec: Function from a block of vectors to the block of their products. The matrix must be
            symmetric. The block is a view of the basis, which restarts overwrite. A matvec that
            keeps the block must clone it.
        like: Tree that shows the structure of a vector.
        k: Number of pairs, at most n.
        which: Wanted eigenvalues. ``"LM"`` takes the largest in absolute value, in that order,
            ``"LA"`` the largest, descending, and ``"SA"`` the smallest, ascending. ``"BE"`` takes
            k/2 from each end, descending, with one more from the top if k is odd. ``"nearest"``
            takes those nearest to ``sigma``, in that order.
        sigma: Number to which the wanted eigenvalues are nearest. The Jacobi-Davidson method then
            searches for them, with corrections by minimal residuals, whose products count as well.
            Their number grows with |A| / gap, where the gap is the distance to the next eigenvalue.
            At the end, three inverse iterations from a random vector search for nearer eigenvalues.
            They may miss one, most likely a further copy of an eigenvalue equal to sigma.
        metric: Positive definite matrix B of the generalised problem A v = value B v: its diagonal,
            a tree like ``like``, or its matvec. The vectors are orthonormal in v'B w, and the
            residuals are those in the norm of B^-1, so that an eigenvalue lies in each interval.
            With a diagonal, the problem is that of B^-1/2 A B^-1/2. With a matvec, the span grows
            by B^-1 (A v - value B v), by conjugate gradients to 1e-6, and the products with B count
            as well.
        block_size: Number of vectors that are multiplied at once. Only blocks of at least b vectors
            are sure to find all copies of an eigenvalue of multiplicity b.
        basis_size: Largest number of basis vectors, at least k + 2 block_size. The default is the
            larger of 2 k + 60 and k + 4 block_size. If pairs converge slowly, as at the small end
            of a Hessian, a large basis saves many products. If a product costs less than a pass
            over the basis, a small one saves time. Six eigenpairs of a sparse Laplacian of 10^5
            rows take 452 products and 3.4 s by default, and 458 and 2.2 s with basis_size=32.
        basis_bytes: Largest memory of the basis, the next block and the pairs, in bytes. The
            default is half of the available memory. The limit lowers ``basis_size`` if necessary.
            With ``basis_device`` it is a limit for that device and excludes the pairs. Set it if
            several ranks keep their bases in the memory of one host.
        basis_dtype: Dtype of the basis, by default that of the vectors, but at least float32.
            ``torch.bfloat16`` takes half of the memory of float32. Products are still computed and
            combined in float32, but basis entries are rounded to 2^-9 of their size, and residuals
            do not fall far below 2e-3 |A|. Use ``rtol=0.01`` or more. If the rounding is visible in
            the final check, k more products measure the residuals. Values are off by up to 2^-9.
        basis_device: Device of the basis, by default that of the vectors. ``"cpu"`` keeps the basis
            of a GPU's vectors in page-locked host memory and copies it to the GPU in pieces, the
            next one while the current one is in use. The GPU then holds two pieces, of 128 MiB or
            of one vector, besides the block and the pairs. The results are those of a basis on the
            GPU up to rounding. A resumed run may use another device.
        rtol: Relative tolerance: the run stops when each residual is at most
            max(rtol |value|, atol).
        atol: Absolute tolerance of the residuals, in units of the eigenvalues.
        max_matvecs: Budget, the largest number of matvecs, including the final check.
        search: Largest number of products of the certificate. Fewer are made once it is below 5 %,
            or if it would stay above 50 %. With 0 there is none, and a given start is trusted.
        start: Start vector as a tree, or a block of vectors, for example those of an earlier run.
            If the block has more than ``block_size`` vectors, random combinations of all of them
            are used. The default is random. A given start may lie in an invariant subspace. The run
            therefore adds Lanczos steps from a random vector outside of the basis, one product
            each, until a wanted eigenvalue there would very probably have appeared.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Eigenpairs`. If not all k pairs have converged, ``converged`` and ``reason`` say so.

    Raises:
        ValueError: If an option is out of range, or if the matvec is not symmetric.
        MemoryError: If a basis of k + 2 block_size vectors does not fit in memory, or if the pieces
            of a basis on another device do not.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a basis vector, at most one at the end, and up to ``search`` if block_size < k.
    A given start costs about the matvecs of a few more pairs, to show that nothing was missed.
    Reorthogonalisation reads the m vectors of the basis twice, in 4 m n flops a matvec. It is bound
    by memory: 30 float32 vectors of 10^6 entries take 9.5 ms on one core at 25 GB/s. Memory:
    (basis_size + block_size + k) n numbers besides those of a product, and 5 n more if
    block_size < k.
    With a basis of m vectors on another device, a block step copies it twice, once for each
    projection: 2 m n numbers. A restart moves up to 4 m n. With ``"nearest"`` or the matvec of a
    metric, the run begins at k random vectors or more, finds up to k copies of an eigenvalue, and
    makes no certificate. It keeps 2 basis_size + 42 vectors, and basis_size more with a metric.

    Source: Wu and Simon 2000, Thick-restart Lanczos method; block form: Chen, Epperly, Meyer,
    Musco and Rao 2025, arXiv 2508.06486. Pairs near a shift: Sleijpen and van der Vorst 1996.
    """
    products = Products.of(matvec, like, run.get("space"))
    space = products.space
    if not 1 <= k <= space.n:
        raise ValueError(f"k={k}: the matrix has {space.n} eigenvalues, choose 1 to {space.n}")
    at_least(1, block_size=block_size, basis_bytes=basis_bytes)
    block_size = min(block_size, space.n)
    at_least(max(k, block_size) + 1, max_matvecs=max_matvecs)
    at_least(min(space.n, k + 2 * block_size), basis_size=basis_size)
    if which not in get_args(Which):
        raise ValueError(f"which={which!r}: choose 'LM', 'LA', 'SA', 'BE' or 'nearest'")
    if which == "nearest" and sigma is None:
        raise ValueError("which='nearest': pass sigma=, to which the eigenvalues are nearest")
    if which != "nearest" and sigma is not None:
        raise ValueError(f"sigma={sigma} has no meaning for which={which!r}: take which='nearest'")
    if metric is not None and not callable(metric):
        scaled = Scaled.by(products, metric)
        run, start = scaled.of_run(run), None if start is None else scaled.unscaled(start)
        products = scaled
    if which == "nearest" or callable(metric):
        if block_size > 1 or basis_bytes or basis_dtype or basis_device:
            raise ValueError(
                "which='nearest' and the matvec of a metric take vectors one by one, in a basis "
                "like the vectors: omit block_size, basis_bytes, basis_dtype and basis_device"
            )
        davidson = Davidson(
            k=k,
            which=which,
            sigma=sigma,
            metric=metric if callable(metric) else None,
            basis_size=basis_size,
            rtol=rtol,
            atol=atol,
            start=start,
        )
        pairs = run_method(davidson, products, run, max_matvecs=max_matvecs)
    else:
        krylov = Lanczos(
            k=k,
            which=which,
            block_size=block_size,
            basis_size=basis_size,
            basis_dtype=basis_dtype or rows_dtype(space),
            basis_device=home(space, basis_device),
            basis_bytes=basis_bytes,
            rtol=rtol,
            atol=atol,
            search=search,
            start=start,
        )
        # The last product is reserved for the check of the pairs.
        pairs = run_method(krylov, products, run, max_matvecs=max_matvecs, kept=1)
    return products.scaled(pairs) if isinstance(products, Scaled) else pairs
