"""What a backup reads of libvirt's XML, and what it asks for in XML."""

import xml.etree.ElementTree as ET

import pytest

from nbdsrv.source.hypervisor import SourceError
from nbdsrv.source.libvirt_xml import (
    MAX_CHAIN,
    Checkpoint,
    DomainDisk,
    Listen,
    backup_xml,
    checkpoint_xml,
    job_paths,
    parse_checkpoint,
    parse_domain,
)

DOMAIN = """
<domain type='kvm' id='3'>
  <name>web</name>
  <uuid>14541ad1-5d73-4f65-8bed-d9ab543eb1ab</uuid>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/vms/top.qcow2' index='2'/>
      <backingStore type='file' index='3'>
        <format type='qcow2'/>
        <source file='/vms/base.qcow2'/>
        <backingStore/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/lv'/><target dev='vdb' bus='virtio'/>
      <readonly/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'><host name='mon' port='6789'/></source>
      <target dev='vdc' bus='scsi'/>
    </disk>
    <disk type='block' device='lun'>
      <driver name='qemu' type='raw'/><source dev='/dev/sdz'/><target dev='sdb' bus='scsi'/>
    </disk>
    <disk type='vhostuser' device='disk'>
      <source type='unix' path='/run/v.sock'/><target dev='vdd' bus='virtio'/>
    </disk>
    <channel type='unix'>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+107</label></seclabel>
</domain>
"""


def test_a_domain_with_all_kinds_of_disks():
    domain = parse_domain(DOMAIN)
    assert (domain.name, domain.uuid) == ("web", "14541ad1-5d73-4f65-8bed-d9ab543eb1ab")
    assert domain.agent
    assert domain.owner == (64055, 107)
    vda, vdb, vdc, sdb, vdd = domain.disks
    assert vda == DomainDisk(
        "vda", ("/vms/top.qcow2", "/vms/base.qcow2"), "qcow2", "file", "virtio", "S1"
    )
    assert vdb == DomainDisk("vdb", ("/dev/vg/lv",), "raw", "block", "virtio", read_only=True)
    assert vdc.images == ("rbd://mon:6789/pool/image",)
    assert "handed through" in sdb.obstacle
    assert "another process" in vdd.obstacle


def test_an_agent_that_is_not_connected_is_none():
    assert not parse_domain(DOMAIN.replace("'connected'", "'disconnected'")).agent


@pytest.mark.parametrize("label", ["root:root", "+1:+99999999999", "", "+0"])
def test_a_label_that_is_no_pair_of_numbers_tells_nothing(label):
    assert parse_domain(DOMAIN.replace("+64055:+107", label)).owner is None


def test_a_chain_without_end_is_cut():
    layer = "<backingStore><source file='/x'/>"
    text = (
        "<domain><name>a</name><uuid>u</uuid><devices><disk><source file='/t'/>"
        + layer * 400
        + "</backingStore>" * 400
        + "<target dev='vda'/></disk></devices></domain>"
    )
    assert len(parse_domain(text).disks[0].images) == MAX_CHAIN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<domain>",
        "<network/>",
        "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>",
        "<domain>" + " " * (16 << 20) + "</domain>",
        "<domain><devices>"
        + "<disk><source file='/a'/><target dev='vda'/></disk>" * 2
        + "</devices></domain>",
    ],
)
def test_what_is_no_domain_is_an_error_of_ours(text):
    with pytest.raises(SourceError):
        parse_domain(text)


def test_a_checkpoint_tells_which_images_it_was_made_of():
    text = f"""
    <domaincheckpoint>
      <name>nbdsrv-A</name><description>words</description>
      <parent><name>virtnbdbackup.0</name></parent>
      <creationTime>1764113351</creationTime>
      <disks>
        <disk name='vda' checkpoint='bitmap' bitmap='nbdsrv-A'/>
        <disk name='vdb' checkpoint='no'/>
        <disk name='gone' checkpoint='bitmap' bitmap='nbdsrv-A'/>
      </disks>
      {DOMAIN}
    </domaincheckpoint>"""
    expected = Checkpoint("nbdsrv-A", 1764113351, {"vda": "/vms/top.qcow2", "gone": ""}, "words")
    assert expected == parse_checkpoint(text)


@pytest.mark.parametrize("time", ["", "-1", "9" * 40, "soon"])
def test_a_checkpoint_without_a_sensible_time(time):
    text = f"<domaincheckpoint><name>a</name><creationTime>{time}</creationTime></domaincheckpoint>"
    assert parse_checkpoint(text).created == 0


def test_a_backup_of_two_disks_one_of_them_in_part():
    text = backup_xml(
        Listen(socket="/run/a&b/nbd"),
        ["vda", "vdb"],
        {"vda": "/s/vda.scratch", "vdb": "/s/'vdb'<.scratch"},
        {"vda": "nbdsrv-A"},
    )
    root = ET.fromstring(text)
    assert root.get("mode") == "pull"
    assert root.find("server").attrib == {"transport": "unix", "socket": "/run/a&b/nbd"}
    vda, vdb = root.iterfind("disks/disk")
    assert vda.get("incremental") == "nbdsrv-A"
    assert (vda.get("exportname"), vda.get("exportbitmap")) == ("vda", "backup-vda")
    assert vdb.get("backupmode") == "full"
    assert vdb.get("exportbitmap") is None
    assert vdb.find("scratch").get("file") == "/s/'vdb'<.scratch"
    assert job_paths(text) == ["/run/a&b/nbd", "/s/vda.scratch", "/s/'vdb'<.scratch"]


def test_a_backup_over_tcp():
    listen = Listen(host="10.0.0.1", port=10810, tls=True)
    root = ET.fromstring(backup_xml(listen, ["vda"], {"vda": "/s"}, {}))
    expected = {"transport": "tcp", "name": "10.0.0.1", "port": "10810", "tls": "yes"}
    assert expected == root.find("server").attrib


def test_a_checkpoint_names_its_disks_only():
    root = ET.fromstring(checkpoint_xml("nbdsrv-A", "made by us", ["vda", "vdb"]))
    assert root.findtext("name") == "nbdsrv-A"
    assert [disk.get("name") for disk in root.iterfind("disks/disk")] == ["vda", "vdb"]
