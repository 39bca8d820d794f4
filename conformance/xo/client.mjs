// Drives Xen Orchestra's own NBD client the way its backups do.
//
// node client.mjs MODULES JOB, where JOB is JSON:
//   { client: 'single' | 'multi' | 'disk' | 'stdio', settings, blockSize }
// Prints JSON: { size, digest, map?, blocks? }. Exits 1 with the error's text otherwise.

import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'

const [modules, job] = process.argv.slice(2)
const { client: kind, settings, blockSize } = JSON.parse(job)

const load = name => import(pathToFileURL(join(modules, '@vates/nbd-client', name)))
// Fail at the first error instead of trying again: a server at fault must not get a second chance.
const options = { readBlockRetries: 1, reconnectRetry: 1, connectTimeout: 1e4, messageTimeout: 2e4 }

async function open() {
  if (kind === 'multi') {
    const { default: MultiNbdClient } = await load('multi.mjs')
    return new MultiNbdClient(settings, { ...options, nbdConcurrency: 4, readAhead: 16 })
  }
  const { default: NbdClient, NbdStdioClient } = await load('index.mjs')
  return kind === 'stdio' ? new NbdStdioClient(settings, options) : new NbdClient(settings, options)
}

async function readThrough(client) {
  await client.connect()
  const size = Number(client.exportSize)
  const count = Math.ceil(size / blockSize)
  const hash = createHash('sha256')
  if (kind === 'multi') {
    const indexes = function* () {
      for (let index = 0; index < count; index++) {
        yield { index, size: blockSize }
      }
    }
    for await (const block of client.readBlocks(indexes)) {
      hash.update(block)
    }
  } else {
    // Sixteen in flight on one socket, as readBlocks() does it.
    for (let first = 0; first < count; first += 16) {
      const batch = Array.from({ length: Math.min(16, count - first) }, (_, i) =>
        client.readBlock(first + i, blockSize)
      )
      for (const block of await Promise.all(batch)) {
        hash.update(block)
      }
    }
  }
  const map = kind === 'stdio' || settings.cert !== undefined ? undefined : await client.getMap()
  await client.disconnect()
  return { size, digest: hash.digest('hex'), map }
}

async function readDisk() {
  const { NbdDisk } = await load('NbdDisk.mjs')
  const disk = new NbdDisk(settings, blockSize)
  await disk.init()
  const size = disk.getVirtualSize()
  const hash = createHash('sha256')
  let blocks = 0
  for (let index = 0; index < Math.ceil(size / blockSize); index++) {
    if (disk.hasBlock(index)) {
      blocks++
      hash.update((await disk.readBlock(index)).data)
    } else {
      hash.update(Buffer.alloc(blockSize))
    }
  }
  await disk.close()
  return { size, digest: hash.digest('hex'), blocks }
}

try {
  const result = kind === 'disk' ? await readDisk() : await readThrough(await open())
  console.log(JSON.stringify(result))
} catch (error) {
  console.error(error?.stack ?? String(error))
  process.exit(1)
}
