// Opens ComfyUI's real page in a real browser, loads a template from the template browser, runs it, and keeps a
// screenshot. It also says what the page wrote to its console, and whether the page sends what the API files hold.
//
//   python dev.py serve --port 8199            (in another terminal)
//   npm install playwright-core                (anywhere; NODE_PATH leads to it; and a Chromium)
//   NODE_PATH=…/node_modules node docs/screenshot.mjs http://127.0.0.1:8199 "Edit one part" docs/screenshot.png \
//       example_workflows/api/edit_one_part.json
//
// CHROMIUM names the browser (/usr/bin/chromium otherwise). RUN=0 only loads the template. Exit code 1 if something is
// wrong with it.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const { chromium } = createRequire(process.env.NODE_PATH ? `${process.env.NODE_PATH}/` : import.meta.url)('playwright-core')
const [address = 'http://127.0.0.1:8188', template = 'Edit one part', picture = 'docs/screenshot.png', apiFile] =
  process.argv.slice(2)
const RUN_TIMEOUT = 300_000
// What this page says with any workflow on a server without ComfyUI's own templates and API nodes.
const ALWAYS = /user\.css|\/userdata|templates\/index\.json|core workflow templates|api\.comfy\.org|Failed to load resource/

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--force-device-scale-factor=1'],
})
const page = await browser.newPage({ viewport: { width: 1920, height: 1000 }, colorScheme: 'dark' })
const complaints = []
const complain = (text) => ALWAYS.test(text) || complaints.push(text)
page.on('console', (message) => {
  if (['error', 'warning'].includes(message.type())) complain(`${message.type()}: ${message.text().slice(0, 300)}`)
})
page.on('pageerror', (error) => complain(`exception: ${error.message}`))
page.on('response', (response) => {
  if (response.status() >= 400) complain(`HTTP ${response.status()}: ${response.url()}`)
})

await page.goto(address)
await page.waitForFunction(() => window.app?.graph && window.app?.extensionManager, null, { timeout: 60_000 })
await page.evaluate(async () => {
  const settings = window.app.extensionManager.setting
  await settings.set('Comfy.Minimap.Visible', false)
  await settings.set('Comfy.Graph.CanvasInfo', false)
})
await page.waitForTimeout(3000)
const dialog = page.locator('.p-dialog, [role="dialog"]')
if (!(await dialog.count())) await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'))
await dialog.first().waitFor()
await page.waitForTimeout(2000)
await page.screenshot({ path: '/tmp/templates.png' })
await page.getByText(template, { exact: true }).first().click()
await dialog.first().waitFor({ state: 'detached' })
await page.waitForFunction(() => window.app.graph.nodes.some((node) => node.type.startsWith('SaveImage')))
await page.locator('button:has(.pi-times), button:has(.icon-\\[lucide--x\\])').first().click({ timeout: 2000 }).catch(() => {})
await page.evaluate(fillTheWindow, { left: 75, top: 105, right: 1900, bottom: 985 })
await page.waitForTimeout(1500)

let wrong = 0
if (apiFile) {
  const sent = await page.evaluate(async () => (await window.app.graphToPrompt()).output)
  const expected = JSON.parse(readFileSync(apiFile, 'utf8'))
  const inputs = (prompt) =>
    JSON.stringify(Object.entries(prompt).map(([id, node]) => [id, node.class_type, Object.entries(node.inputs).sort()]).sort())
  const same = inputs(sent) === inputs(expected)
  console.log(same ? `the page sends exactly ${apiFile}` : `DIFFERENT from ${apiFile}:\n${JSON.stringify(sent, null, 1)}`)
  wrong += !same
}

if (process.env.RUN !== '0') {
  await page.evaluate(() => {
    window.ended = null
    for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
      window.app.api.addEventListener(name, (event) => (window.ended = [name, event.detail]))
  })
  await page.getByRole('button', { name: 'Run', exact: true }).first().click()
  await page.waitForFunction(() => window.ended, null, { timeout: RUN_TIMEOUT })
  const [name, detail] = await page.evaluate(() => window.ended)
  console.log(name, name === 'execution_success' ? '' : detail.exception_message)
  wrong += name !== 'execution_success'
  await page.waitForTimeout(3000)
}
await page.screenshot({ path: picture })
console.log(complaints.length ? `the page's console:\n  ${complaints.join('\n  ')}` : 'the console is clean')
if (process.env.SAVED) {
  const { writeFileSync } = await import('node:fs')
  writeFileSync(process.env.SAVED, JSON.stringify(await page.evaluate(() => window.app.graph.serialize()), null, 2))
}
await browser.close()
process.exit(wrong ? 1 : 0)

/** Puts all groups and nodes into a rectangle of the window. */
function fillTheWindow({ left, top, right, bottom }) {
  const { graph, canvas } = window.app
  const boxes = [...graph.nodes, ...graph.groups].map((item) => item.boundingRect ?? [...item.pos, ...item.size])
  const x = Math.min(...boxes.map((box) => box[0]))
  const y = Math.min(...boxes.map((box) => box[1]))
  const width = Math.max(...boxes.map((box) => box[0] + box[2])) - x
  const height = Math.max(...boxes.map((box) => box[1] + box[3])) - y
  const scale = Math.min((right - left) / width, (bottom - top) / height)
  const frame = canvas.canvas.getBoundingClientRect()
  canvas.ds.scale = scale
  canvas.ds.offset = [(left - frame.left) / scale - x, (top - frame.top) / scale - y]
  canvas.setDirty(true, true)
}
