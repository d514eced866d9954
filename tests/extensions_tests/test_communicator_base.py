import pytest

from extensions.communicator_base import first_few


@pytest.mark.parametrize(
    'n, text',
    [(0, ''), (1, '0'), (3, '0; 1; 2'), (4, '0; 1; 2 and 1 more'), (9, '0; 1; 2 and 6 more')],
)
def test_the_first_few_and_how_many_more(n, text):
    assert first_few([str(i) for i in range(n)], '; ') == text
