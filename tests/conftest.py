import pytest
import torch
from hypothesis import settings

import potqat

settings.register_profile("potqat", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("potqat")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=potqat.cpu_info()["built"])
def isa(request):
    """Each instruction set this binary holds; the ones this machine lacks show as skipped."""
    before = potqat.cpu_info()["isa"]
    if request.param not in potqat.cpu_info()["available"]:
        pytest.skip(f"this machine has no {request.param}")
    potqat.set_isa(request.param)
    assert potqat.cpu_info()["isa"] == request.param
    yield request.param
    potqat.set_isa(before)


@pytest.fixture
def one_thread():
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
