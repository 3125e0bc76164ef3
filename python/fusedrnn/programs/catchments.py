"""Generated catchments: their weather, and the runoff that a conceptual model with snow and storage makes.

Weather: wet days by a Markov chain with amounts from a gamma distribution (Richardson 1981); temperature as
a season plus an autoregressive rest; potential evaporation from the temperature (Oudin et al. 2005). Runoff:
snow in elevation bands by degree-days, soil, two groundwater stores and routing, as in HBV (Bergström 1976).
The model's parameters follow from what is known of a catchment, each but for a random factor of about a
tenth; the measured runoff has an error of a tenth. Day 0 is 1 October, a year has 365 days.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fusedrnn.autograd import Array

YEAR, BANDS, SPIN_UP, ROUTED = 365, 5, 2, 8  # days; bands; years that are dropped; days that routing takes


class Site(NamedTuple):
    """What is known of catchments, ``(C,)`` each."""

    elevation: Array  # m, mean
    relief: Array  # m, from the mean to the highest band
    forest: Array  # share
    soil: Array  # m, depth
    permeability: Array  # 0 to 1
    log_area: Array  # log10 of km²


class Parameters(NamedTuple):
    """Of the model, ``(C,)`` each; mm and days."""

    melt: Array  # mm of snow for each degree and day
    capacity: Array  # of the soil
    shape: Array  # exponent of what part of the water passes the soil
    percolation: Array  # a day, from the upper to the lower store
    threshold: Array  # of the upper store: what is above it runs off fast
    fast: Array  # shares of a store that run off in a day
    upper: Array
    lower: Array
    routing: Array  # base of the triangle over which runoff arrives


class Water(NamedTuple):
    """``(days, C)`` each, mm."""

    runoff: Array
    evaporation: Array
    storage: Array  # in all stores, at the end of the day


class Catchments(NamedTuple):
    forcing: Array  # (days, C, 3): precipitation, temperature, potential evaporation
    site: Array  # (C, 6)
    runoff: Array  # (days, C), measured
    exact: Array  # the same without the measuring error


def draw_weather(rng: np.random.Generator, site: Site, days: int) -> Array:
    """``(days, C, 3)``: precipitation in mm, temperature in °C, potential evaporation in mm."""
    count = len(site.elevation)
    day_of_year = (np.arange(days)[:, np.newaxis] + 273) % YEAR
    season = np.cos(2 * np.pi * (day_of_year - 200) / YEAR)  # 1 in July
    share, persistence = rng.uniform(0.3, 0.55, count), 0.35  # of wet days
    chance, noise = rng.random((days, count)), rng.normal(0, 2.2, (days, count))
    wet, rest = np.zeros((days, count), bool), np.zeros((days, count))
    for t in range(1, days):
        wet[t] = chance[t] < (1 - persistence) * share + persistence * wet[t - 1]
        rest[t] = 0.8 * rest[t - 1] + noise[t]
    annual = rng.uniform(600, 1400, count) * (1 + site.elevation / 4000)
    amounts = rng.gamma(0.7, 1 / 0.7, (days, count)) * (1 + rng.uniform(-0.4, 0.4, count) * season)
    precipitation = wet * amounts * annual / YEAR / share
    mean = rng.uniform(10, 14, count) - 0.0065 * site.elevation
    temperature = mean + rng.uniform(7, 11, count) * season + rest
    sun = 10.9 + 6.2 * np.cos(2 * np.pi * (day_of_year - 172) / YEAR)  # mm that it could evaporate, 45° N
    potential = sun * np.maximum(temperature + 5, 0) / 100
    return np.stack([precipitation, temperature, potential], axis=2)


def draw_parameters(rng: np.random.Generator, site: Site) -> Parameters:
    """They follow from the site, but for a factor of 1 ± 0.1."""
    k = site.permeability
    means = Parameters(
        melt=5 - 2.5 * site.forest,
        capacity=300 * site.soil,
        shape=1.5 + 2 * site.forest,
        percolation=0.5 + 2.5 * k,
        threshold=20 + 30 * k,
        fast=0.5 - 0.2 * k,
        upper=0.25 - 0.15 * k,
        lower=0.05 - 0.04 * k,
        routing=1 + 1.2 * site.log_area,
    )
    return Parameters(*(mean * rng.lognormal(0, 0.1, len(mean)) for mean in means))


def flow(forcing: Array, relief: Array, p: Parameters) -> Water:
    """Run the model from empty stores. Higher bands are colder and get more precipitation."""
    days, count, _ = forcing.shape
    above = relief[:, np.newaxis] * np.linspace(-1, 1, BANDS)
    snow, held = np.zeros((2, count, BANDS))  # dry snow, and the water in it
    soil, upper, lower = np.zeros((3, count))
    arriving, evaporation, storage = np.empty((3, days, count))
    degrees = p.melt[:, np.newaxis]
    for t, (precipitation, temperature, potential) in enumerate(np.swapaxes(forcing, 1, 2)):
        warmth = temperature[:, np.newaxis] - 0.0065 * above
        fallen = precipitation[:, np.newaxis] * (1 + 0.0004 * above)
        snowfall = fallen * np.clip((1 - warmth) / 2, 0, 1)
        melt = np.minimum(snow, degrees * np.maximum(warmth, 0))
        frozen = np.minimum(held, 0.05 * degrees * np.maximum(-warmth, 0))
        snow += snowfall - melt + frozen
        held += fallen - snowfall + melt - frozen
        released = np.maximum(held - 0.1 * snow, 0)
        held -= released
        liquid = released.mean(axis=1)

        passed = liquid * (soil / p.capacity) ** p.shape
        soil += liquid - passed
        over = np.maximum(soil - p.capacity, 0)
        soil -= over
        evaporation[t] = np.minimum(potential * np.minimum(soil / (0.7 * p.capacity), 1), soil)
        soil -= evaporation[t]

        upper += passed + over
        down = np.minimum(upper, p.percolation)
        upper -= down
        lower += down
        out = p.fast * np.maximum(upper - p.threshold, 0) + p.upper * upper
        base = p.lower * lower
        upper -= out
        lower -= base
        arriving[t] = out + base
        storage[t] = (snow + held).mean(axis=1) + soil + upper + lower
    runoff = route(arriving, p.routing)
    return Water(runoff, evaporation, storage + np.cumsum(arriving - runoff, axis=0))


def route(arriving: Array, base: Array) -> Array:
    """Spread each day's water over the following days by a triangle of this base."""
    share = np.minimum(np.arange(ROUTED + 1)[:, np.newaxis] / base, 1)
    arrived = np.where(share < 0.5, 2 * share**2, 1 - 2 * (1 - share) ** 2)
    runoff = np.zeros_like(arriving)
    for k, weight in enumerate(np.diff(arrived, axis=0)):
        runoff[k:] += weight * arriving[: len(arriving) - k]
    return runoff


def draw(seed: int, count: int, years: int) -> Catchments:
    """Catchments of this seed, after the years in which the stores fill."""
    rng = np.random.default_rng(seed)
    elevation = rng.uniform(200, 1800, count)
    site = Site(
        elevation=elevation,
        relief=elevation * rng.uniform(0.1, 0.4, count),
        forest=rng.random(count),
        soil=rng.uniform(0.3, 1.5, count),
        permeability=rng.random(count),
        log_area=rng.uniform(1, 3, count),
    )
    forcing = draw_weather(rng, site, (SPIN_UP + years) * YEAR)
    exact = flow(forcing, site.relief, draw_parameters(rng, site)).runoff
    measured = exact * rng.lognormal(-0.005, 0.1, exact.shape)
    kept = slice(SPIN_UP * YEAR, None)
    return Catchments(forcing[kept], np.stack(site, axis=1), measured[kept], exact[kept])
