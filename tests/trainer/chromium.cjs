// Opens a report in headless Chromium: node chromium.cjs PAGE FOLDER. Prints JSON, writes pictures.
// CHROMIUM names the program; puppeteer-core must be on NODE_PATH.
const puppeteer = require("puppeteer-core");
const [path, folder] = process.argv.slice(2);
const args = ["--no-sandbox", "--no-zygote", "--single-process", "--disable-gpu",
  "--no-proxy-server", "--disable-dev-shm-usage"];

(async () => {
  const browser = await puppeteer.launch(
    {executablePath: process.env.CHROMIUM, headless: "shell", pipe: true, args});
  const page = await browser.newPage(), said = [], seen = {};
  page.on("console", message => said.push(message.text()));
  page.on("pageerror", error => said.push(error.message));
  page.on("request", request => {
    if (!/^(file|data):/.test(request.url())) said.push(request.url());
  });
  for (const [name, width, scheme] of
    [["light", 1100, "light"], ["dark", 1100, "dark"], ["phone", 390, "light"]]) {
    await page.setViewport({width, height: 900});
    await page.emulateMediaFeatures([{name: "prefers-color-scheme", value: scheme}]);
    await page.goto("file://" + path);
    seen[name] = await page.evaluate(() => ({
      overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      drawn: document.querySelectorAll("figure path.curve").length,
      back: getComputedStyle(document.body).backgroundColor,
    }));
    await page.screenshot({path: `${folder}/report-${name}.png`, fullPage: true});
  }
  const plot = await page.$("figure .plot");
  await plot.evaluate(element => element.scrollIntoView({block: "center"}));
  const box = await plot.boundingBox();
  await page.mouse.move(box.x + box.width * 0.6, box.y + 60);
  seen.tip = await page.$eval("#tip", element => element.innerText);
  await page.emulateMediaType("print");
  await page.screenshot({path: `${folder}/report-paper.png`, fullPage: true});
  await browser.close();
  console.log(JSON.stringify({said, ...seen}));
})();
