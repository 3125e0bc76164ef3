"""Print the constants of csrc/simd/math.h: minimax coefficients of expm1, and ln 2 in two parts.

expm1(r) = r + r^2 (c2 + c3 r + ...) on |r| <= ln(2)/2, the first coefficient fixed at one. What is minimised
is the largest error relative to expm1(r) (Remez exchange, 60 digits); the coefficients are then rounded.

Run: python tools/coefficients.py        (needs mpmath)
"""

from mpmath import cos, expm1, linspace, log, lu_solve, matrix, mp, mpf, nstr, pi, polyval

mp.dps = 60
EDGE = log(2) / 2 * mpf("1.0001")  # n comes from a rounded product, so r can lie a little beyond ln(2)/2
GRID = linspace(-EDGE, EDGE, 1000)  # an even count: 0, where the weight vanishes, is not on it


def error(coefficients, r):
    """The approximation's error at r, relative to |expm1(r)|."""
    tail = polyval(coefficients[::-1], r) if coefficients else 0
    return (r + r**2 * tail - expm1(r)) / abs(expm1(r))


def worst(coefficients):
    return max(abs(error(coefficients, r)) for r in GRID)


def remez(count):
    """`count` coefficients c2, c3, ... with the smallest largest error."""
    middle = mpf(len(GRID) - 1) / 2
    points = [GRID[int(middle * (1 - cos(pi * k / count)))] for k in range(count + 1)]
    while True:
        rows, goal = [], []
        for k, r in enumerate(points):
            scale = r**2 / abs(expm1(r))
            rows.append([scale * r**j for j in range(count)] + [(-1) ** k])
            goal.append((expm1(r) - r) / abs(expm1(r)))
        solution = list(lu_solve(matrix(rows), matrix(goal)))
        coefficients, level = solution[:count], abs(solution[count])
        extrema = []  # the largest error of each run of equal signs
        for r in GRID:
            e = error(coefficients, r)
            if not extrema or (e > 0) != (extrema[-1][1] > 0):
                extrema.append((r, e))
            elif abs(e) > abs(extrema[-1][1]):
                extrema[-1] = (r, e)
        if len(extrema) != count + 1:
            raise ArithmeticError(f"{len(extrema)} alternations, expected {count + 1}")
        points = [r for r, _ in extrema]
        if max(abs(e) for _, e in extrema) < level * mpf("1.001"):
            return coefficients


def rounded(x, bits):
    """x to `bits` significant bits, ties to even."""
    with mp.workprec(bits):
        return +x


def show(dtype, count, bits, high_bits, suffix):
    exact = remez(count)
    coefficients = [rounded(c, bits) for c in exact]
    high = rounded(log(2), high_bits)
    errors = [nstr(log(worst(c), 2), 4) for c in (exact, coefficients)]
    print(f"{dtype}: relative error 2^{errors[0]}, with rounded coefficients 2^{errors[1]}")
    for name, value in [("log2e", 1 / log(2)), ("ln2_high", high), ("ln2_low", log(2) - high)]:
        print(f"  {name} = {float(rounded(value, bits)).hex()}{suffix}")
    print("  expm1 = {" + ", ".join(float(c).hex() + suffix for c in coefficients) + "}")


if __name__ == "__main__":
    # ln2_high leaves room for n (n * ln2_high is exact): 8 bits of 24, 11 bits of 53.
    show("float", 5, 24, 15, "f")
    show("double", 11, 53, 40, "")
