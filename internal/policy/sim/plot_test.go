package sim

import (
	"image/color"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// drawPlot writes bars: for each trace, the misses of each policy as a part of those of FIFO, on average over the capacities.
func drawPlot(file string, rows []row) error {
	var names []string
	for _, r := range rows {
		if !slices.Contains(names, r.trace.Name) {
			names = append(names, r.trace.Name)
		}
	}
	slices.Reverse(names) // the first at the top
	p := plot.New()
	p.Title.Text = "Misses after warm-up, FIFO = 1 (less is better)"
	p.Legend.Top = true
	p.Add(plotter.NewGrid())
	shown := []struct {
		column int
		color  color.Color
	}{
		{colDefault, color.RGBA{0x1b, 0x6c, 0xa8, 0xff}},
		{colS3, color.RGBA{0xe0, 0x8e, 0x2b, 0xff}},
		{colTwoQ, color.RGBA{0xf2, 0xc9, 0x7d, 0xff}},
		{colLRU, color.RGBA{0x8f, 0x8f, 0x8f, 0xff}},
		{colOptimal, color.RGBA{0xd0, 0xd0, 0xd0, 0xff}},
	}
	const width = 4
	for i, s := range shown {
		var v plotter.Values
		for _, name := range names {
			sum, n := 0.0, 0
			for _, r := range rows {
				if r.trace.Name == name {
					sum += r.results[s.column].Ratio() / r.results[colFIFO].Ratio()
					n++
				}
			}
			v = append(v, sum/float64(n))
		}
		bars, err := plotter.NewBarChart(v, vg.Points(width))
		if err != nil {
			return err
		}
		bars.Horizontal, bars.Color, bars.LineStyle.Width = true, s.color, 0
		bars.Offset = vg.Points(width * float64(len(shown)/2-i))
		p.Add(bars)
		p.Legend.Add(columns[s.column], bars)
	}
	p.NominalY(names...)
	p.X.Min, p.X.Max = 0, 1.75 // room for the legend
	return p.Save(22*vg.Centimeter, 20*vg.Centimeter, file)
}
