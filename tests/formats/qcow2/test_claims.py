"""What becomes of segments when some clusters of the image file are claimed twice."""

from nbdsrv.formats.image_file import open_image_file
from nbdsrv.formats.page import Kind, Segment
from nbdsrv.formats.qcow2.claims import without_conflicts

CLUSTER = 4096


def test_segments_of_an_external_data_file_stay_in_that_file(tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(CLUSTER))
    outside = open_image_file(str(path))
    try:
        segments = [Segment(CLUSTER, Kind.DATA, 0, outside), Segment(CLUSTER, Kind.DATA, CLUSTER)]
        kept = without_conflicts(segments, [(0, CLUSTER)], CLUSTER)
        assert segments == kept
    finally:
        outside.close()


def test_a_doubtful_cluster_becomes_a_block_that_cannot_be_decoded():
    segments = [Segment(3 * CLUSTER, Kind.DATA, 8 * CLUSTER)]
    kept = without_conflicts(segments, [(9 * CLUSTER, 10 * CLUSTER)], CLUSTER)
    assert [Kind.DATA, Kind.BLOCK, Kind.DATA] == [each.kind for each in kept]
    assert [CLUSTER] * 3 == [each.length for each in kept]
