// The site's three moving parts: search, light or dark, and lists that fold on narrow screens. The pages can be read without it.
const $ = s => document.querySelector(s), root = document.documentElement, html = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt()};`)

$('#theme').onclick = () => {
  const dark = (root.style.colorScheme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'))=='dark'
  root.style.colorScheme = dark ? 'light' : 'dark'
  try { localStorage.theme = root.style.colorScheme } catch {}
}

for (const [list, width] of [['.toc details', 75], ['.sidebar details', 48]]) {
  const narrow = matchMedia(`(max-width: ${width}rem)`), fold = () => { if ($(list)) $(list).open = !narrow.matches }
  narrow.onchange = fold; fold()
}

const box = $('#search'), found = $('#found')
// sections are [href, page, heading, text]; every word must occur, and one in a heading counts more
function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean), hits = []
  for (const [href, page, heading, text] of window.SECTIONS || []) {
    const h = heading.toLowerCase(), p = page.toLowerCase(), t = text.toLowerCase()
    const score = words.map(w => h==w ? 40 : h.startsWith(w) ? 15 : h.includes(w) ? 10 : p.includes(w) ? 5 : t.includes(w) ? 1 : 0)
    if (words.length && Math.min(...score)) {
      const at = Math.max(0, t.indexOf(words[0])-30)
      hits.push([score.reduce((a,b) => a+b), href, page, heading, (at ? '…' : '') + text.slice(at, at+100)])
    }
  }
  return hits.sort((a,b) => b[0]-a[0]).slice(0, 12)
}
function show() {
  const hits = search(box.value)
  found.innerHTML = hits.map(([_, href, page, heading, text]) => `<li><a href="${html(href)}"><b>${html(heading)}</b> <i>${html(page)}</i><span>${html(text)}</span></a></li>`).join('') ||
    `<li class="none">${window.SECTIONS ? 'Nothing found.' : 'Loading …'}</li>`
  found.hidden = !box.value.trim()
}
box.oninput = show
box.onfocus = () => {
  if (!window.SECTIONS && !$('#sections')) document.head.append(Object.assign(document.createElement('script'), {id: 'sections', src: 'sections.js', onload: show}))
  show()
}
addEventListener('keydown', e => {
  if (e.key=='/' && document.activeElement!=box) { e.preventDefault(); box.focus() }
  if (e.key=='Escape') { found.hidden = true; box.blur() }
  if (e.key=='Enter' && document.activeElement==box) found.querySelector('a')?.click()
  if (e.key=='ArrowDown' || e.key=='ArrowUp') {
    const all = [box, ...found.querySelectorAll('a')], i = all.indexOf(document.activeElement)
    if (i>=0 && !found.hidden) { e.preventDefault(); all[Math.max(0, Math.min(all.length-1, i + (e.key=='ArrowDown' ? 1 : -1)))].focus() }
  }
})
addEventListener('click', e => { if (!e.target.closest('.search') || e.target.closest('#found a')) found.hidden = true })
