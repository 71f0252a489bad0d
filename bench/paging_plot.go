//go:build linux

package bench

import (
	"fmt"
	"image/color"
	"io"
	"math"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// WriteSVG draws the report: two rows of three plots with throughput by size, and a row of bars for the works of one size.
func (r *PagingReport) WriteSVG(w io.Writer) error {
	canvas := vgsvg.New(15*vg.Inch, 12*vg.Inch)
	var plots [][]*plot.Plot
	for i, work := range Works {
		p, err := r.plotWork(work)
		if err != nil {
			return fmt.Errorf("plot: %w", err)
		}
		if i%3 == 0 {
			plots = append(plots, nil)
		}
		plots[i/3] = append(plots[i/3], p)
	}
	drawTiles(draw.New(canvas), plots)
	if _, err := canvas.WriteTo(w); err != nil {
		return fmt.Errorf("write plot: %w", err)
	}
	return nil
}

func (r *PagingReport) plotWork(work Work) (*plot.Plot, error) {
	p := newPlot(string(work), "", "GB/s")
	defer func() { p.Y.Max = max(p.Y.Max, 0.01) * 1.4 }() // room for the legend
	if !work.swept() {
		p.X.Tick.Marker = plot.ConstantTicks(nil)
		p.X.Min, p.X.Max = -0.5, float64(len(PagedSystems))-0.5
		for i, s := range r.measured() {
			x := r.find(s, work, work.times())
			if x == nil {
				continue
			}
			bar, err := plotter.NewBarChart(plotter.Values{x.Rate.Median / 1e9}, vg.Points(30))
			if err != nil {
				return nil, err
			}
			bar.Color, bar.LineStyle.Width, bar.XMin = pagedHue(s), 0, float64(i)
			p.Add(bar)
			p.Legend.Add(s, bar)
		}
		return p, nil
	}
	p.X.Label.Text = "size of the memory, in budgets"
	var ticks []plot.Tick
	for _, n := range r.Options.Times {
		ticks = append(ticks, plot.Tick{Value: math.Log2(float64(n)), Label: fmt.Sprint(n)})
	}
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	for _, s := range r.measured() {
		var at plotter.XYs
		for _, n := range r.Options.Times {
			if x := r.find(s, work, n); x != nil {
				at = append(at, plotter.XY{X: math.Log2(float64(n)), Y: x.Rate.Median / 1e9})
			}
		}
		if len(at) == 0 {
			continue
		}
		line, dots, err := plotter.NewLinePoints(at)
		if err != nil {
			return nil, err
		}
		line.Color, dots.Color, dots.Shape = pagedHue(s), pagedHue(s), draw.CircleGlyph{}
		p.Add(line, dots)
		p.Legend.Add(s, line, dots)
	}
	return p, nil
}

func pagedHue(system string) color.Color { return hues[slices.Index(PagedSystems, system)] }
