"""One thread each: these models are tiny, and on a shared machine a second thread costs more in waiting than it saves."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
