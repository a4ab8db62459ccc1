"""Backward elimination: exact costs and orders, against brute force."""

from __future__ import annotations

import pytest
import torch

from lightning_mi_prune.importance.elimination import eliminate
from lightning_mi_prune.importance.information import conditional_covariance, joint_information
from tests.importance.test_information import gaussian


@pytest.mark.parametrize(("d", "entries"), [(9, 1), (12, 3), (150, 1), (420, 1), (480, 2)])
def test_costs_of_eliminated_units_add_up_to_the_information_lost(d, entries):
    """Chain rule; 150 units make the delayed updates flush and shrink, 420 in several products."""
    sxx, sxy, syy = gaussian(d, 6)
    posterior = torch.linalg.inv(conditional_covariance(sxx, sxy, syy))
    result = eliminate([(torch.linalg.inv(sxx), posterior)], keep=1, entries=entries)
    total = joint_information(sxx, sxy, syy).item()
    units = d // entries
    for keep in {1, units // 2, units - 1}:
        kept = [i * entries + j for i in result.keep(keep, units) for j in range(entries)]
        left = joint_information(sxx[kept][:, kept], sxy[kept], syy).item()
        lost = sum(result.costs[: units - keep])
        assert lost == pytest.approx(total - left, rel=1e-6, abs=1e-9)
    assert sorted(result.order + result.keep(1, units)) == list(range(units))


@pytest.mark.parametrize(("d", "entries"), [(8, 1), (40, 1), (12, 2)])
def test_elimination_is_what_brute_force_does(d, entries):
    sxx, sxy, syy = gaussian(d, 4)
    posterior = torch.linalg.inv(conditional_covariance(sxx, sxy, syy))
    result = eliminate([(torch.linalg.inv(sxx), posterior)], keep=d // entries - 5, entries=entries)
    left = list(range(d // entries))
    for unit, cost in zip(result.order, result.costs, strict=True):

        def information(units):
            rows = [i * entries + j for i in units for j in range(entries)]
            return joint_information(sxx[rows][:, rows], sxy[rows], syy).item()

        full = information(left)
        losses = {u: full - information([v for v in left if v != u]) for u in left}
        best = min(losses, key=losses.__getitem__)
        assert best == unit
        assert cost == pytest.approx(losses[best], abs=1e-8)
        left.remove(best)


def test_elimination_leaves_its_arguments_alone():
    sxx, sxy, syy = gaussian(80, 4)
    precision = torch.linalg.inv(sxx)
    posterior = torch.linalg.inv(conditional_covariance(sxx, sxy, syy))
    copies = precision.clone(), posterior.clone()
    eliminate([(precision, posterior)])
    assert torch.equal(precision, copies[0])
    assert torch.equal(posterior, copies[1])


def test_leave_one_out_cost_is_half_the_log_ratio_of_precisions():
    sxx, sxy, syy = gaussian(6, 3)
    p = torch.linalg.inv(sxx)
    q = torch.linalg.inv(conditional_covariance(sxx, sxy, syy))
    expected = (q.diagonal() / p.diagonal()).log() / 2
    result = eliminate([(p, q)], keep=5)
    assert result.order == (int(expected.argmin()),)
    assert result.costs[0] == pytest.approx(expected.min().item())
