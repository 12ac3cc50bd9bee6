"""What is known of each public data set: task, source, terms, citation and folder layouts.

`verified` layouts were read off the publisher's own repository (its file list or its README); the
others are as published work uses them and were not checked against the release. Terms say "not
stated" where the publisher's page was read and says nothing, "not checked" where it could not be.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Folders of the sources a and b below the data set's own folder; `{split}` is filled in.

    `splits` are those that this layout holds (empty: all). `listed` means that one folder holds
    the pairs of every split, to be picked by the lists in data/splits. `endings` tells a from b
    where file names differ (see `PairFolder`). `labels` is where the task's labels lie. `packed`
    means four-channel pictures in one folder (see `PackedFolder`), `split_list` the publisher's own
    list of a split's pairs.
    """

    a: str
    b: str
    splits: tuple[str, ...] = ()
    listed: bool = False
    endings: tuple[str, str] = ("", "")
    labels: str = ""
    packed: bool = False
    split_list: str = ""
    verified: bool = False


@dataclass(frozen=True)
class DatasetInfo:
    """One named data set.

    `pairs` counts the published pairs, `sources` are the folder names of a and b in fusionkit's own
    layout NAME/SPLIT/SOURCE, `folders` other names of the data set's folder, `source` the
    publisher's page. `labels` is "maps" or "boxes" for sets that have them, and `classes` the names
    of their classes by number. `urls` are the folders of plain files for a and b that can be
    downloaded.
    """

    name: str
    title: str
    task: str
    pairs: int
    splits: tuple[str, ...]
    sources: tuple[str, str]
    source: str
    terms: str
    citation: str
    published: tuple[Layout, ...] = ()
    folders: tuple[str, ...] = ()
    note: str = ""
    labels: str = ""
    classes: tuple[str, ...] = ()
    urls: tuple[str, str] | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """fusionkit's layout, then the published ones."""
        a, b = self.sources
        labels = "{split}/labels" if self.labels else ""
        own = Layout(f"{{split}}/{a}", f"{{split}}/{b}", labels=labels, verified=True)
        return (own, *self.published)


def _harvard(modality: str, pairs: int) -> DatasetInfo:
    return DatasetInfo(
        f"harvard_mri_{modality}",
        f"Harvard MRI-{modality.upper()}",
        "mif",
        pairs,
        ("train", "test"),
        (modality, "mri"),
        "http://www.med.harvard.edu/AANLIB/",
        "not checked",
        "K. A. Johnson, J. A. Becker: The Whole Brain Atlas",
        note="The atlas publishes single slices; the pairs have to be gathered by hand.",
    )


# The names by number, as the papers or releases list them; the numbers of FMB's label maps and of
# YOLO text for M3FD were not checked against the releases.
_MFNET = "unlabelled, car, person, bike, curve, car stop, guardrail, color cone, bump"
_FMB = (
    "background, road, sidewalk, building, traffic light, traffic sign, vegetation, sky, person, "
    "car, truck, bus, motorcycle, bicycle, pole"
)
_M3FD = "People, Car, Bus, Lamp, Motorcycle, Truck"

_ROADSCENE = "https://raw.githubusercontent.com/hanna-xu/RoadScene/HEAD"

ENTRIES = (
    DatasetInfo(
        "roadscene",
        "RoadScene",
        "ivif",
        221,
        ("train", "test"),
        ("ir", "vi"),
        "https://github.com/hanna-xu/RoadScene",
        "not stated; cut from a video by FLIR",
        "Xu et al., U2Fusion: A Unified Unsupervised Image Fusion Network, TPAMI 2020",
        (Layout("cropinfrared", "crop_LR_visible", listed=True, verified=True),),
        ("RoadScene", "RoadScene-master"),
        "The 50 test pairs are those that CDDFuse and others test on.",
        urls=(f"{_ROADSCENE}/cropinfrared", f"{_ROADSCENE}/crop_LR_visible"),
    ),
    DatasetInfo(
        "tno",
        "TNO",
        "ivif",
        25,
        ("test",),
        ("ir", "vi"),
        "https://doi.org/10.6084/m9.figshare.1008029",
        "not checked; see the figshare record",
        "Toet: The TNO Multiband Image Data Collection, Data in Brief 2017",
        folders=("TNO",),
        note="The release holds many more scenes; the 25 usual pairs are gathered by hand.",
    ),
    DatasetInfo(
        "msrs",
        "MSRS",
        "ivif",
        1444,
        ("train", "test"),
        ("ir", "vi"),
        "https://github.com/Linfeng-Tang/MSRS",
        "not stated; built from MFNet",
        "Tang et al., PIAFusion, Information Fusion 2022",
        (Layout("{split}/ir", "{split}/vi", labels="{split}/Segmentation_labels"),),
        ("MSRS", "MSRS-main"),
        "`git clone` of the repository gives this layout.",
        labels="maps",
        classes=tuple(_MFNET.split(", ")),
    ),
    DatasetInfo(
        "m3fd",
        "M3FD",
        "ivif",
        4500,
        ("train", "test"),
        ("ir", "vi"),
        "https://github.com/JinyuanLiu-CV/TarDAL",
        "not checked",
        "Liu et al., Target-aware Dual Adversarial Learning (TarDAL), CVPR 2022",
        (
            Layout(
                "M3FD_Detection/Ir",
                "M3FD_Detection/Vis",
                splits=("train",),
                labels="M3FD_Detection/Annotation",
            ),
            Layout("M3FD_Fusion/Ir", "M3FD_Fusion/Vis", splits=("test",)),
        ),
        ("M3FD",),
        "Our convention: train = the 4,200 pairs for detection, test = the 300 for fusion.",
        labels="boxes",
        classes=tuple(_M3FD.split(", ")),
    ),
    DatasetInfo(
        "fmb",
        "FMB",
        "ivif",
        1500,
        ("train", "test"),
        ("ir", "vi"),
        "https://github.com/JinyuanLiu-CV/SegMiF",
        "not stated",
        "Liu et al., Multi-interactive Feature Learning (SegMiF), ICCV 2023",
        (Layout("{split}/Infrared", "{split}/Visible", labels="{split}/Label"),),
        ("FMB",),
        labels="maps",
        classes=tuple(_FMB.split(", ")),
    ),
    DatasetInfo(
        "mfnet",
        "MFNet",
        "ivif",
        1569,
        ("train", "val", "test"),
        ("ir", "vi"),
        "https://www.mi.t.u-tokyo.ac.jp/static/projects/mil_multispectral/",
        "not checked",
        "Ha et al., MFNet: Towards Real-time Semantic Segmentation, IROS 2017",
        (Layout("images", "images", labels="labels", packed=True, split_list="{split}.txt"),),
        ("MFNet",),
        "The release has the thermal picture as fourth channel of one PNG.",
        labels="maps",
        classes=tuple(_MFNET.split(", ")),
    ),
    DatasetInfo(
        "llvip",
        "LLVIP",
        "ivif",
        15488,
        ("train", "test"),
        ("ir", "vi"),
        "https://bupt-ai-cz.github.io/LLVIP/",
        "non-commercial: research, teaching, publications, personal experiments",
        "Jia et al., LLVIP: A Visible-infrared Paired Dataset for Low-light Vision, ICCVW 2021",
        (Layout("infrared/{split}", "visible/{split}", labels="Annotations", verified=True),),
        ("LLVIP",),
        labels="boxes",
        classes=("person",),
    ),
    DatasetInfo(
        "realmff",
        "Real-MFF",
        "mfif",
        710,
        ("all",),
        ("a", "b"),
        "https://github.com/Zancelot/Real-MFF",
        "not stated",
        "Zhang et al., Real-MFF, Pattern Recognition Letters 2020",
        (Layout("imageA", "imageB", endings=("_A", "_B")),),
        ("Real-MFF", "RealMFF"),
    ),
    DatasetInfo(
        "mfi_whu",
        "MFI-WHU",
        "mfif",
        120,
        ("all",),
        ("a", "b"),
        "https://github.com/HaoZhang1018/MFI-WHU",
        "not stated; built from public data sets",
        "Zhang et al., MFF-GAN, Information Fusion 2020",
        (Layout("source_1", "source_2"),),
        ("MFI-WHU",),
    ),
    DatasetInfo(
        "lytro",
        "Lytro",
        "mfif",
        20,
        ("test",),
        ("a", "b"),
        "https://github.com/mnnejati/LytroDataset",
        "not checked",
        "Nejati et al., Multi-focus Image Fusion Using Dictionary-based Sparse Representation, "
        "Information Fusion 2015",
        (Layout(".", ".", endings=("-A", "-B")),),
        ("Lytro", "LytroDataset"),
    ),
    DatasetInfo(
        "mfifb",
        "MFIFB",
        "mfif",
        105,
        ("train",),
        ("a", "b"),
        "https://github.com/xingchenzhang/MFIFB",
        "not stated",
        "Zhang, Multi-focus Image Fusion: A Benchmark, arXiv:2005.01116",
        folders=("MFIFB",),
        note="Released as input/PAIR/PAIR_A, PAIR_B: gather by hand. Our list has the 56 "
        "other than Lytro's; a and b are in no fixed order of near and far.",
    ),
    DatasetInfo(
        "sice",
        "SICE",
        "meif",
        589,
        ("train", "test"),
        ("under", "over"),
        "https://github.com/csjcai/SICE",
        "not stated",
        "Cai et al., Learning a Deep Single Image Contrast Enhancer, TIP 2018",
        folders=("SICE",),
        note="Released as sequences, one folder each: pick an under- and an over-exposure by hand.",
    ),
    DatasetInfo(
        "mefb",
        "MEFB",
        "meif",
        100,
        ("train", "test"),
        ("under", "over"),
        "https://github.com/xingchenzhang/MEFB",
        "not stated",
        "Zhang, Benchmarking and Comparing Multi-exposure Fusion, Information Fusion 2021",
        folders=("MEFB",),
        note="Released as input/PAIR/ with irregular names: gather by hand. Our lists have 66.",
    ),
    _harvard("ct", 14),
    _harvard("pet", 28),
    _harvard("spect", 48),
)
