"""Generated slides with their truth: the demo and the tests need no download."""

from slideflow_ray.phantoms.files import halved, read_marks, write_marked_slide, write_pyramid
from slideflow_ray.phantoms.kidney import write_glomeruli, write_kidney_cohort
from slideflow_ray.phantoms.tem import write_tem_cohort
from slideflow_ray.phantoms.tumour import Truth, Tumour, cohort_rows, geojson, write_cohort, write_slide

__all__ = [
    "Truth",
    "Tumour",
    "cohort_rows",
    "geojson",
    "halved",
    "read_marks",
    "write_cohort",
    "write_glomeruli",
    "write_kidney_cohort",
    "write_marked_slide",
    "write_pyramid",
    "write_slide",
    "write_tem_cohort",
]
