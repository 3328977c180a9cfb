"""Which products Triton's kernels are compiled with on Hopper, and how a miscompiled one shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compiled import uniform

pytest.importorskip("triton")

from setformer_kernels.backends.triton.host import tiles

# As ptxas 12.8 made the descriptors of an operand (shortened): UR18 is read before anything has written it.
BROKEN = """
        /*0000*/                   S2UR UR4, SR_CgaCtaId ;
        /*0010*/                   UIADD3 UR16, UR4, 0x2000, URZ ;
        /*0020*/                   UMOV UR17, 0x40000040 ;
        /*0030*/                   UIADD3 UR18, UP0, UR18, 0x20, URZ ;
        /*0040*/                   UMOV UR19, 0xc0000010 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R56, gdesc[UR16].tnspA.tnspB, RZ, !UPT, gsb0 ;
        /*0060*/                   EXIT ;
"""
# The loop's second turn may read what the first has written, and a product of registers reads one descriptor.
WHOLE = """
        /*0000*/                   UMOV UR18, 0x20 ;
        /*0010*/                   UIADD3.64 UR20, UR18, 0x4, URZ ;
.L_x_0:
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   UIADD3 UR22, UR22, 0x1, URZ ;
.L_x_1:
        /*0040*/                   UMOV UR22, 0x0 ;
        /*0050*/                   UMOV UR19, 0xc0000010 ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR16].tnspB, RZ, !UPT, gsb0 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_a_lost_descriptor_is_found() -> None:
    assert [found.split()[0] for found in uniform.undefined(BROKEN)] == ["0030"]
    assert "reads UR18" in uniform.undefined(BROKEN)[0]
    fixed = BROKEN.replace("UIADD3 UR18, UP0, UR18, 0x20, URZ", "UMOV UR18, 0x20")
    assert uniform.undefined(fixed) == []
    assert (
        "reads UR16, UR17"
        in uniform.undefined(fixed.replace("UR16, UR4", "UR6, UR4").replace("UR17, 0x4", "UR7, 0x4"))[0]
    )


def test_what_some_way_has_written_is_no_fault() -> None:
    wide = WHOLE.replace("UMOV UR18, 0x20 ;", "LDCU.128 UR16, c[0x0][0x380] ;")
    assert uniform.undefined(wide) == []
    assert uniform.undefined(WHOLE.replace("UIADD3.64 UR20, UR18", "UIADD3.64 UR20, UR16")) != []
    assert uniform.undefined(WHOLE.replace("UMOV UR18, 0x20", "UMOV UR18, 0x20 ;\n /*0008*/ UMOV UR19, 0x0")) == []


def test_of_16_bits_only_kernels_whose_descriptors_are_known_to_hold_have_asynchronous_products() -> None:
    kinds = {key[0] for key, tile in tiles.HOPPER.items() if tile.wgmma and key[2] == "half"}
    assert kinds == {"row", "column", "pooling", "read_backward", "columns_backward"}
    for table in (tiles.DEFAULT, tiles.AMPERE, tiles.AMD):
        assert not any(tile.wgmma for tile in table.values())


def test_triton_is_told_which_products_to_use() -> None:
    """In a process of its own: this one may interpret its kernels."""
    command = [sys.executable, "-c", "import test_triton_products; test_triton_products.told()"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def told() -> None:
    """What Triton reads while it compiles, and that the caller's own word stands."""
    from setformer_kernels.backends.triton.host import direct

    plain, hopper = tiles.DEFAULT["gradient", "small", "half"], tiles.HOPPER["row", "small", "half"]
    for given in (None, "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(direct.NO_WGMMA, raising=False)
            if given is not None:
                patch.setenv(direct.NO_WGMMA, given)
            with direct.products_of(plain):
                assert os.environ[direct.NO_WGMMA] == (given or "1")
            with direct.products_of(hopper):
                assert os.environ.get(direct.NO_WGMMA) == given
            assert os.environ.get(direct.NO_WGMMA) == given
