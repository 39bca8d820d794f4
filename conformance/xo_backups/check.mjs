// Drives Xen Orchestra's own backup code over a remote.
//
// node check.mjs MODULES JOB, where JOB is JSON:
//   { path, encryptionKey?, useVhdDirectory, action: 'read' | 'merge' | 'hold', streams?, count? }
// read:  lists all backups, reads every disk of them as a restore does, and runs cleanVm without
//        changes; with streams, writes each disk as the VHD stream that XAPI would be sent there.
// merge: deletes the oldest `count` backups and lets cleanVm merge; then reads.
// hold:  takes the lock on the VM, prints a line, and releases it when stdin ends.
// Prints JSON.

import { createHash } from 'node:crypto'
import { createWriteStream } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { pathToFileURL } from 'node:url'

const [modules, text] = process.argv.slice(2)
const { path, encryptionKey, useVhdDirectory, action, streams, count } = JSON.parse(text)
const require = createRequire(join(modules, 'x.js'))
const load = name => import(pathToFileURL(join(modules, name)))

const { getSyncedHandler } = require('@xen-orchestra/fs')
const { RemoteAdapter } = await load('@xen-orchestra/backups/RemoteAdapter.mjs')
const { toVhdStream } = await load('vhd-lib/disk-consumer/index.mjs')

const { value: handler, dispose } = await getSyncedHandler({
  url: `file://${path}`,
  encryptionKey,
  useVhdDirectory,
})
const adapter = new RemoteAdapter(handler, { vhdDirectoryCompression: 'brotli' })
const warnings = []
const clean = (vm, opts) =>
  adapter.cleanVm(`xo-vm-backups/${vm}`, {
    ...opts,
    logInfo: () => {},
    logWarn: (message, data) => warnings.push(`${message} ${JSON.stringify(data)}`),
  })

async function readDisk(open, name) {
  const disk = await open()
  const size = disk.getVirtualSize()
  const content = Buffer.alloc(size)
  for await (const { index, data } of disk.diskBlocks()) {
    data.copy(content, index * disk.getBlockSize())
  }
  await disk.close()
  return { name, size, digest: createHash('sha256').update(content).digest('hex') }
}

async function read() {
  const backups = []
  for (const [vm, metadatas] of Object.entries(await adapter.listAllVmBackups())) {
    for (const metadata of metadatas) {
      const { disks, vdis, vm: record } = await adapter.readIncrementalVmBackup(metadata)
      const rows = []
      for (const [ref, disk] of Object.entries(disks)) {
        rows.push(await readDisk(() => disk, vdis[ref].name_label))
      }
      if (streams !== undefined) {
        const again = await adapter.readIncrementalVmBackup(metadata)
        for (const [ref, disk] of Object.entries(again.disks)) {
          const file = join(streams, `${metadata.timestamp}-${vdis[ref].name_label}.vhd`)
          await pipeline(await toVhdStream(disk), createWriteStream(file))
        }
      }
      backups.push({ id: metadata.id, vm: record.name_label, memory: record.memory_static_max, disks: rows })
    }
    await clean(vm, { remove: false, merge: false })
  }
  return backups
}

let merged
if (action === 'hold') {
  const [vm] = await adapter.listAllVms()
  const lock = await handler.lock(`xo-vm-backups/${vm}`)
  console.log(JSON.stringify({ held: vm }))
  for await (const _ of process.stdin);
  await lock.dispose()
} else {
  if (action === 'merge') {
    for (const [vm, metadatas] of Object.entries(await adapter.listAllVmBackups())) {
      await adapter.deleteDeltaVmBackups(metadatas.slice(0, count))
      merged = (await clean(vm, { remove: true, merge: true })).merge
    }
  }
  console.log(JSON.stringify({ backups: await read(), merged, warnings }))
}
await dispose()
