"""What people see, printed as it is."""

import pytest

from mochi_lora.console import console, errors


@pytest.mark.parametrize("printer", [console, errors])
def test_a_colon_in_a_path_is_no_picture(printer, capsys):
    """rich knows `:-1:` as a thumb that points down, with markup off as well."""
    told = "x.safetensors:-1: no such adapter file, nor :fox:"
    printer.print(told, markup=False)
    printed = capsys.readouterr()
    assert told in printed.out + printed.err
