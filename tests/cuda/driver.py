"""The least that runs the kernels on a problem: step by step, or all steps in one launch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fusedrnn.cells import GRU, LSTM, RNN

P, N = ctypes.c_void_p, ctypes.c_int64


class Steps(ctypes.Structure):
    _fields_ = [("T", N), ("B", N), ("lengths", P), ("reset", P), ("reverse", ctypes.c_bool), ("detach_every", N)]


class ForwardJob(ctypes.Structure):
    _fields_ = [("steps", Steps), ("H", N)] + [(n, P) for n in
        "projected bias weight h0 c0 y hT cT h_states c_states c saved".split()] + [("saved_step", N)] + [
        (n, P) for n in "operand products arrived".split()] + [("units", N), ("rows", N)]


class BackwardJob(ctypes.Structure):
    _fields_ = [("steps", Steps), ("H", N)] + [(n, P) for n in
        "weight y h0 c0 c saved dy dhT dcT dh_states dc_states da dh0 dc0 chain direct dc arrived".split()] + [
        ("units", N), ("rows", N)]


# type, A, input (first, gates), recurrent (first, gates), recurrent2 gate, saved
TABLE = {
    RNN(): ("RnnTanh", 1, (0, (0,)), (0, (0,)), None, 0),
    RNN(relu=True): ("RnnRelu", 1, (0, (0,)), (0, (0,)), None, 0),
    LSTM(): ("Lstm", 4, (0, (0, 1, 2, 3)), (0, (0, 1, 2, 3)), None, 4),
    GRU(): ("GruResetAfter", 4, (0, (2, 0, 1)), (1, (0, 1, 2)), None, 4),
    GRU(reset_after=False): ("GruResetBefore", 3, (0, (0, 1, 2)), (0, (0, 1)), 2, 3),
}


def round_up(n, to):
    return -(-n // to) * to


def grid_shared(rows, columns, units, K, warps, size, resident, tile):
    ct = rt = 1
    while ct * tile < columns:
        ct *= 2
    while rt * 8 < rows and rt * ct < warps:
        rt *= 2
    splits = warps // (ct * rt)
    assert splits >= 1
    n = ct * tile * (round_up(K, 32) + 4) if resident else 0
    return size * (n + rt * 8 * 260 + splits * rt * 8 * ct * tile + 2 * rows * units)


def cluster_shared(rows, columns, units, K, warps, size, tile):
    pitch, r, c, splits = round_up(K, 32) + 4, round_up(rows, 8), round_up(columns, tile), 1
    while splits * 2 * (r // 8) * (c // tile) <= warps:
        splits *= 2
    return size * (c * pitch + 2 * r * pitch + splits * r * c + 2 * rows * units)


def run(device: Any, p: Any, mode: str = "steps", units: int = 2, rows: int = 4, blocks: int = 2, tile: int = 8) -> dict[str, Any]:
    name, A, (i0, ig), (r0, rg), second, S = TABLE[p.cell]
    T, B, I = p.x.shape
    w = p.weights
    H = w.weight_hh.shape[1]
    dt = p.x.dtype
    X, R = len(ig), len(rg)
    ct = {"f": "float", "d": "double"}[dt.char]
    keep = []

    def dev(a):
        if a is None:
            return None
        keep.append(device.asarray(a))
        return keep[-1]

    def ptr(a):
        return None if a is None else device.pointer(a)

    def launch(kernel, grid, *args, shared=0, cooperative=False):
        device.launch(name, ct, kernel, grid, args, shared, cooperative)

    def gates(a, order):
        return np.concatenate([a[g * H : (g + 1) * H] for g in order])

    lengths = dev(None if p.lengths is None else p.lengths.astype(np.int64))
    reset = dev(None if p.reset is None else p.reset.astype(np.uint8))
    steps = Steps(T, B, ptr(lengths), ptr(reset), p.reverse, p.detach_every or 0)
    w_ih, w_hh = dev(gates(w.weight_ih, ig)), dev(gates(w.weight_hh, rg))
    w_hh2 = dev(gates(w.weight_hh, [second])) if second is not None else None
    bias = np.zeros((A, H), dt)
    for k, g in enumerate(ig):
        if w.bias_ih is not None:
            bias[i0 + k] += w.bias_ih.reshape(-1, H)[g]
    for k, g in enumerate(rg):
        if w.bias_hh is not None:
            bias[r0 + k] += w.bias_hh.reshape(-1, H)[g]
    if second is not None and w.bias_hh is not None:
        bias[2] += w.bias_hh.reshape(-1, H)[2]
    bias = dev(bias)
    x = p.x.copy()
    if p.lengths is not None:
        x[np.arange(T)[:, None] >= p.lengths] = 0
    x = dev(x.reshape(T * B, I))
    projected = device.empty((T * B, X * H), dt)
    device.matmul(x, w_ih.T, projected)
    st = [dev(s) for s in p.state0] if p.state0 is not None else [None] * len(p.cell.states)
    h0, c0 = (st + [None])[:2]
    has_c = isinstance(p.cell, LSTM)
    e = device.empty
    y, hT = e((T, B, H), dt), e((B, H), dt)
    cT = e((B, H), dt) if has_c else None
    hs = e((T, B, H), dt) if p.return_states else None
    cs = e((T, B, H), dt) if p.return_states and has_c else None
    c = e((T, B, H), dt) if has_c else None
    saved = e((T, B, S * H), dt) if S else None
    operand, products, products2 = e((B, H), dt), e((B, R * H), dt), e((B, H), dt)
    tiles = -(-B // rows)
    arrived = device.zeros(tiles, np.uint32)
    grid = (-(-H // units), tiles)

    def fjob(prod=products):
        return ForwardJob(steps, H, ptr(projected), ptr(bias), ptr(w_hh), ptr(h0), ptr(c0), ptr(y), ptr(hT), ptr(cT),
            ptr(hs), ptr(cs), ptr(c), ptr(saved), B * S * H, ptr(operand), ptr(prod), ptr(arrived), units, rows)

    if mode == "steps":
        g = (blocks, 1)
        launch("begin_forward", g, fjob())
        for s in range(T):
            device.matmul(operand, w_hh.T, products)
            launch("step_forward", g, fjob(), N(s))
            if second is not None:
                device.matmul(operand, w_hh2.T, products2)
                launch("step_forward2", g, fjob(products2), N(s))
    else:
        suffix = "_streamed" if mode == "streamed" else ""
        kernel = "cluster" if mode == "cluster" else "grid"
        if mode == "cluster":
            n = cluster_shared(rows, units * R, units, H, device.warps, dt.itemsize, tile)
        else:
            n = grid_shared(rows, units * R, units, H, device.warps, dt.itemsize, mode == "grid", tile)
        launch(kernel + "_forward" + suffix, grid, fjob(), shared=n, cooperative=mode != "cluster")

    dy = dev(p.dy)
    dT = [dev(d) for d in p.dstateT] if p.dstateT is not None else []
    dS = [dev(d) for d in p.dstates] if p.dstates is not None else []
    dhT, dcT = (dT + [None, None])[:2]
    dhs, dcs = (dS + [None, None])[:2]
    da = e((T, B, A * H), dt)
    dh0 = e((B, H), dt)
    dc0 = e((B, H), dt) if has_c else None
    chain, direct = e((B, H), dt), e((B, H), dt)
    dc = e((B, H), dt) if has_c else None
    wt = dev(np.ascontiguousarray(w_hh.T))
    arrived2 = device.zeros(tiles, np.uint32)
    bjob = BackwardJob(steps, H, ptr(wt), ptr(y), ptr(h0), ptr(c0), ptr(c), ptr(saved), ptr(dy), ptr(dhT), ptr(dcT),
        ptr(dhs), ptr(dcs), ptr(da), ptr(dh0), ptr(dc0), ptr(chain), ptr(direct), ptr(dc), ptr(arrived2), units, rows)
    if mode == "steps":
        launch("begin_backward", g, bjob)
        for s in reversed(range(T)):
            launch("step_backward", g, bjob, N(s))
            t = T - 1 - s if p.reverse else s
            if second is not None:
                device.matmul(da[t][:, 2 * H :], w_hh2, chain)
                launch("step_backward2", g, bjob, N(s))
            device.matmul(da[t][:, r0 * H : (r0 + R) * H], w_hh, chain)
        launch("finish_backward", g, bjob)
    else:
        if mode == "cluster":
            n = cluster_shared(rows, units, units, R * H, device.warps, dt.itemsize, tile)
        else:
            n = grid_shared(rows, units, units, R * H, device.warps, dt.itemsize, mode == "grid", tile)
        launch(kernel + "_backward" + suffix, grid, bjob, shared=n, cooperative=mode != "cluster")
    hp = e((T, B, H), dt)
    mid = e((T, B, H), dt) if second is not None else None
    launch("operands", (blocks, 1), bjob, P(ptr(hp)), P(ptr(mid)))

    d = da.reshape(T * B, A, H)
    x2 = x
    out = {"y": y, "hT": hT}
    if has_c:
        out["cT"] = cT
    if p.return_states:
        out["h"] = hs
        if has_c:
            out["c"] = cs
    dih, dhh = np.zeros_like(w.weight_ih), np.zeros_like(w.weight_hh)
    bih, bhh = np.zeros(len(dih), dt), np.zeros(len(dih), dt)
    dx = np.zeros((T * B, I), dt)
    for k, gate in enumerate(ig):
        sl = slice(gate * H, (gate + 1) * H)
        dih[sl] = d[:, i0 + k].T @ x2
        bih[sl] = d[:, i0 + k].sum(0)
        dx += d[:, i0 + k] @ w.weight_ih[sl]
    for k, gate in enumerate(rg):
        sl = slice(gate * H, (gate + 1) * H)
        dhh[sl] = d[:, r0 + k].T @ hp.reshape(T * B, H)
        bhh[sl] = d[:, r0 + k].sum(0)
    if second is not None:
        dhh[2 * H :] = d[:, 2].T @ mid.reshape(T * B, H)
        bhh[2 * H :] = d[:, 2].sum(0)
    out |= {"dx": dx.reshape(T, B, I), "dweight_ih": dih, "dweight_hh": dhh}
    if w.bias_ih is not None:
        out["dbias_ih"] = bih
    if w.bias_hh is not None:
        out["dbias_hh"] = bhh
    out["dh0"] = dh0
    if has_c:
        out["dc0"] = dc0
    return {k: np.array(a) for k, a in out.items()}
